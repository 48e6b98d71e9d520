"""The device room: arrays in, arrays out. No file, clock or log."""
