"""The ops of 4-bit layers and of AdamW: the op table (`ops`), and one backend per kind of device (`backends`)."""
