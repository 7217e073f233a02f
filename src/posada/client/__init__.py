"""The Python API. ``posada`` and ``posada.aio`` export what is public of it."""
