"""HTTP around the routers: connections, middleware, keys, limits, idempotency and error responses."""
