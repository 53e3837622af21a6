"""Token-wise parts, one file each that reads like its paper: tokens (b, n, d) -> (b, n, d), each of itself."""
