"""Docker's graph driver plugin protocol, served: any of our drivers for an engine that loads plugins (Docker <= 27).

The protocol is described in the spec's section 3 and in Docker's ``plugins_graphdriver.md``: HTTP/1.1 over a unix
socket, a POST with JSON for every call, a tar stream as the body of two of them. A request's way::

    listener ─ server (hypercorn on trio) ─ app (starlette) ─ a thread ─ service ─ driver

- **listener** has the socket: made here, or handed over by systemd.
- **app** turns calls into messages and back, and carries streams piece by piece.
- **service** knows which driver is in use, also after a restart: the engine says it only once (**session_file**).
"""
