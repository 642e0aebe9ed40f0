"""What a runtime can do: one public file with a PEP 723 header is one backend."""
