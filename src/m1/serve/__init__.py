"""`m1 serve`: any model the engine runs, over HTTP as OpenAI's API, with votes.

Read settings.py (the options), app.py (routes), protocol.py (requests and answers), jobs.py (what a request asks of the
engine), loop.py (the thread that owns the engine).
"""
