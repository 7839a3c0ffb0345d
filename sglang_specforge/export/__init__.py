"""The server's side of the stream: host ring, capture entries, and the thread that sends them."""
