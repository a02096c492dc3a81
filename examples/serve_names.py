"""Serves predictions of languages. Requests that arrive while the model runs share its next call.

    python examples/serve_names.py
    curl 'http://127.0.0.1:8000/?name=Nguyen&name=Rossi'

It listens on this machine only. Install what it needs with `pip install "namernn_fast[examples]"`.
"""

import asyncio

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[examples]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

from namernn_fast import names
from namernn_fast.names.folding import why_unusable

MOST_NAMES = 1000


class Batcher:
    """Runs a function of a list in a thread. One call takes the items of all waiting requests."""

    def __init__(self, function):
        self.function, self.items, self.running, self.next = function, [], None, None

    async def __call__(self, items):
        begin = len(self.items)
        self.items += items
        self.next = self.next or asyncio.create_task(self._run_after(self.running))
        results = await asyncio.shield(self.next)  # a client that leaves cancels only its request
        return results[begin : begin + len(items)]

    async def _run_after(self, previous):
        if previous:
            await asyncio.wait([previous])
        items, self.items, self.running, self.next = self.items, [], self.next, None
        return await asyncio.to_thread(self.function, items)


def application(predictor):
    """Returns the web application: GET /?name=… answers with languages and probabilities."""
    predict = Batcher(predictor.predict)

    async def respond(request):
        given = request.query_params.getlist("name")
        if not 0 < len(given) <= MOST_NAMES:
            return JSONResponse({"error": f"give 1 to {MOST_NAMES} names: /?name=Nguyen"}, 400)
        wrong = {name: why for name in given if (why := why_unusable(name))}
        if wrong:
            return JSONResponse({"error": wrong}, 400)
        return JSONResponse(dict(zip(given, await predict(given), strict=True)))

    return Starlette(routes=[Route("/", respond)])


if __name__ == "__main__":
    uvicorn.run(application(names.load()))
