"""Docker's graph driver plugin protocol, served: any of our drivers for an engine that loads plugins (Docker <= 27).

Docker's ``plugins_graphdriver.md`` describes the protocol: HTTP/1.1 over a unix socket, a POST with JSON for every
call, a tar stream as the body of two of them. A request's way::

    socket ─ server (HTTP) ─ app (the calls) ─ a thread ─ service ─ driver

- The socket is made by :mod:`unionfs.host.sockets`, or handed over by systemd.
- **server** is HTTP and nothing else: connections, their limits, bodies.
- **app** turns calls into **messages** and back, carries streams piece by piece, and runs until a signal.
- **service** knows which driver is in use, also after a restart: the engine says it only once (**session**).
"""
