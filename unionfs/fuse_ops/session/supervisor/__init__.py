"""The supervisor: a process with everything loaded, of which each mount gets a forked copy as its server.

A copy starts in a few milliseconds and shares most of its memory with the others. Nobody depends on the supervisor:
whoever wants a mount starts a server by himself when there is none, or when it declines.

Modules: ``client`` is the request and asks, ``daemon`` listens and keeps one copy ready, ``worker`` is that copy,
``caller`` lets it become like whoever asked.
"""
