"""Watches runs from outside: what their folders and the queue tell, their logs, their end, who is told. No torch."""
