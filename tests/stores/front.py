"""TLS before a server that has none of its own."""

from kit.tls_front import TlsFront

__all__ = ["TlsFront"]
