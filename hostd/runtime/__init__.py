"""The OCI runtime that waits at a gate (``cargo-runc``), and its installation on a host."""
