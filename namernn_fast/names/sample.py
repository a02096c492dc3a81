"""A few hundred common surnames, written for this project as a fallback for the data set.

The sample is enough to see the application work, but too small to train a good model.
"""

from __future__ import annotations

SAMPLE: dict[str, tuple[str, ...]] = {
    language: tuple(names.split())
    for language, names in {
        "Arabic": """
            Haddad Khoury Nasser Mansour Hakimi Saleh Hamdan Qasim Rahman Zaidi Farouk Jaber
            Shadid Barakat Suleiman Tahan Mustafa Abboud Darwish Kanaan""",
        "Chinese": """
            Wang Li Zhang Liu Chen Yang Huang Zhao Wu Zhou Xu Sun Zhu Guo Lin Luo Zheng Liang
            Xie Tang Deng Feng Jiang Cai""",
        "Czech": """
            Novák Svoboda Novotný Dvořák Černý Procházka Kučera Veselý Horák Němec Pokorný
            Marek Pospíšil Hájek Jelínek Král Růžička Beneš Sedláček Krejčí""",
        "Dutch": """
            Jansen Bakker Visser Smit Meijer Mulder Dekker Brouwer Dijkstra Hendriks Dijkman
            Vermeulen Kuipers Schouten Hoekstra Willems Huisman Kloosterman Verhoeven Postma""",
        "English": """
            Smith Taylor Wright Walker Thompson Robinson Clarke Hughes Edwards Turner Parker
            Bennett Cooper Harrison Shaw Holmes Palmer Webster Bradley Whitfield Ashworth""",
        "French": """
            Dubois Moreau Laurent Lefèvre Fournier Girard Bonnet Rousseau Gauthier Chevalier
            Beaumont Renaud Leclerc Boucher Dupuis Marchand Lemaître Duchamp Barbier Perrault""",
        "German": """
            Müller Schmidt Schneider Fischer Weber Wagner Becker Schulz Hoffmann Schäfer Koch
            Zimmermann Krüger Hartmann Lehmann Köhler Kaiser Vogel Friedrich Steinbach""",
        "Greek": """
            Papadopoulos Georgiou Nikolaidis Dimitriou Konstantinou Vasiliadis Ioannou
            Christodoulou Karagiannis Makris Pappas Alexopoulos Stavrou Antoniou Theodorakis
            Economou Galanis Kyriakou Papageorgiou Samaras""",
        "Irish": """
            O'Brien O'Connor O'Sullivan O'Neill Murphy Kelly Byrne Ryan Doyle McCarthy
            Gallagher Doherty Kennedy Lynch Murray Quinn McLoughlin Brennan Fitzgerald Flanagan""",
        "Italian": """
            Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci Marino Greco Conti
            Moretti Barbieri Lombardi Giordano Rinaldi Mancini Bellini Caruso
            Fiorentini""",
        "Japanese": """
            Sato Suzuki Takahashi Tanaka Watanabe Ito Yamamoto Nakamura Kobayashi Kato Yoshida
            Yamada Sasaki Yamaguchi Matsumoto Inoue Kimura Hayashi Shimizu Fujita""",
        "Korean": """
            Kim Lee Park Choi Jung Kang Cho Yoon Jang Lim Han Shin Seo Kwon Hwang Ahn Song Ryu
            Hong Jeon""",
        "Polish": """
            Nowak Kowalski Wiśniewski Dąbrowski Lewandowski Wójcik Kamiński Kowalczyk Zieliński
            Szymański Woźniak Kozłowski Jankowski Mazur Kwiatkowski Krawczyk Piotrowski
            Grabowski Pawłowski Michalski""",
        "Portuguese": """
            Silva Santos Ferreira Pereira Oliveira Rodrigues Martins Sousa Fernandes Gonçalves
            Lopes Marques Almeida Ribeiro Carvalho Teixeira Moreira Correia Nunes Guimarães""",
        "Russian": """
            Ivanov Smirnov Kuznetsov Popov Vasilyev Petrov Sokolov Mikhailov Fyodorov Morozov
            Volkov Alekseev Lebedev Semyonov Egorov Pavlov Kozlov Stepanov Orlov Zakharov""",
        "Scottish": """
            MacDonald Campbell Stewart Robertson Anderson MacKenzie MacLeod Fraser Cameron
            Ferguson Hamilton Graham Johnston Duncan Sinclair Munro Buchanan Sutherland McIntosh
            Drummond""",
        "Spanish": """
            García Fernández González Rodríguez López Martínez Sánchez Pérez Gómez Jiménez Ruiz
            Hernández Díaz Moreno Álvarez Muñoz Romero Gutiérrez Navarro Domínguez""",
        "Vietnamese": """
            Nguyễn Trần Lê Phạm Huỳnh Phan Vũ Võ Bùi Hồ Ngô Dương Lý Trịnh Đinh Mai Hoàng Cao
            Lương Tô""",
    }.items()
}
"""Surnames by language, in the alphabetical order of the 18 languages."""
