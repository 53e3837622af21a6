"""Shards behind a URL: fetched whole, ahead of need, into a bounded cache that the processes of a node share."""
