"""Tools around files of updates and checkpoints: inspect, convert, merge, extract, resize, strip, compare."""
