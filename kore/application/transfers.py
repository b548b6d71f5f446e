"""``kore.curl`` and ``kore.httpclient``, with the limits that the application set in ``kore.config``.

They stand here because limits are options, and the floor of the clients knows of no options.
"""

from __future__ import annotations

from kore.application.declared import config
from kore.clients import transfers
from kore.clients.curl import curl as curl
from kore.clients.httpclient import httpclient as httpclient

transfers.limits = config
