"""HTTP: the engine for programs that speak OpenAI's and Anthropic's APIs. What requests mean is `protocol`'s business.

serve      the command: sockets, loading, signals, the end
app        the routes, as an ASGI application
settings   who may ask, and how much
guard      every request on its way in: who asks, from where, and with what headers
bodies     JSON bodies, read within limits and strictly
answers    requests handed to the engine, and what comes back while the client is still there
sse        frames as bytes of an event stream
metrics    numbers for Prometheus
openapi    the document that describes the routes
http1      HTTP/1.1 on a connection: deadlines, refusals, and an end that the client gets to read
log        lines on stderr that wait for nobody"""
