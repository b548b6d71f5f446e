"""What handlers talk to beside their clients: PostgreSQL databases, and servers reached through libcurl."""
