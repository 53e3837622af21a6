"""The white box: what each layer of a CRATE does to its tokens, in numbers and in pictures."""
