"""The 4-bit format of bitsandbytes in plain torch: levels, blocks and bytes."""
