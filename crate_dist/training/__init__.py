"""The training itself: the engine, the loop, and everything that watches over it."""
