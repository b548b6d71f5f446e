"""``kore.dbsetup``: naming the databases that an application asks.

It belongs to what an application declares, for its limits are options; the pools below know of no options.
"""

from __future__ import annotations

from kore.application.declared import config
from kore.clients.postgresql import queries


def dbsetup(name: str, conninfo: str, /) -> bool:
    """Give a database a name for `kore.dbquery`; True. A name that is known keeps its first connection string.

    `conninfo` is what libpq takes, ``"host=/tmp dbname=hello"`` or a URI, completed by a service file and the PG*
    environment. pgsql_conn_max is taken as it is now. Nothing is connected yet; callable in the parent and in workers.

    Raises TypeError for what is no str, ValueError for an option that libpq does not have or kore does not offer, or a
    NUL; RuntimeError when the package asyncpg is missing (reference: kore.dbsetup; kore-api.md 14.1).
    """
    queries.declare(name, conninfo, config.pgsql_conn_max, lambda: config.pgsql_queue_limit)
    return True
