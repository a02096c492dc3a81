"""The web server of the names application: `python -m namernn_fast.names serve`.

`responder` runs the model, `batching` combines concurrent requests into one call to the model,
`requests` reads and checks bodies, `server` is the Starlette application, `running` runs the
application under uvicorn, and `page` holds the files that a browser loads. The modules `requests`,
`server` and `running` need the extra `serve`, so nothing imports them before `serve` runs.
"""
