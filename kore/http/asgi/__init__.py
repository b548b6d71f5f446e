"""ASGI 3 applications (Starlette, FastAPI, Django ...) as handlers of kore: see `kore.application.mounts.asgi`."""
