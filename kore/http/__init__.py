"""HTTP/1.1: parsing, routing and answering. The parsers know no socket and no clock; the connection knows both."""
