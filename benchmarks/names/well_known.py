"""Well-known surnames and their languages, to illustrate the network's predictions.

The list was fixed before the pretrained network was trained, and no choice was based on the list.
Many of the names occur in the data, so the list does not measure accuracy on new names.
"""

WELL_KNOWN = {
    "Arabic": ("Al-Farsi", "Hussein", "Mansour"),
    "Chinese": ("Wang", "Zhao", "Xiao"),
    "Czech": ("Dvořák", "Novotná", "Svoboda", "Čapek"),
    "Dutch": ("van Gogh", "de Vries", "Rembrandt", "Huygens"),
    "English": ("Shakespeare", "Churchill", "Watson"),
    "French": ("Dupont", "Lefèvre", "Moreau", "Béranger"),
    "German": ("Müller", "Schröder", "Weiß", "Schumacher"),
    "Greek": ("Papadopoulos", "Theodorakis", "Kazantzakis"),
    "Irish": ("O’Connor", "Ó Súilleabháin", "O’Sullivan"),
    "Italian": ("Rossi", "Bianchi", "De Luca"),
    "Japanese": ("Yamamoto", "Kurosawa", "Miyazaki"),
    "Korean": ("Park", "Choi", "Kwon"),
    "Polish": ("Wałęsa", "Kowalski", "Wiśniewski", "Lewandowski"),
    "Portuguese": ("Silva", "Pereira", "Magalhães", "Saramago"),
    "Russian": ("Dostoevsky", "Tchaikovsky", "Rimsky-Korsakov", "Solzhenitsyn"),
    "Scottish": ("MacDonald", "Campbell"),
    "Spanish": ("García", "Rodríguez", "Núñez", "Ibáñez"),
    "Vietnamese": ("Nguyễn", "Tran"),
}
