"""The same arithmetic, fast: one op table (`ops`), and a backend for each kind of device."""
