"""The engine as a child process of an app: JSON lines on stdin and stdout, one message a line.

messages  every message, both ways: read, checked, written, and their JSON Schema
streams   the three standard streams, protected: lines in, lines out, log lines
life      how the process ends in time: who its parent is, and a clock that cannot be held up
beside    the HTTP API of the same model, where it is asked for
helper    what the messages do: one model, many requests"""
