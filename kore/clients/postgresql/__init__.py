"""PostgreSQL: connection strings, a pool of connections for each worker and database, queries, transactions, LISTEN.

asyncpg connects, authenticates, and runs queries whose results are Python values. Text results are read from the wire
by session.py, which takes a connected transport over from it: asyncpg asks for binary results only and decodes them
itself, and what PostgreSQL prints for a value of any type is known to PostgreSQL alone.
"""
