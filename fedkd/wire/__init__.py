"""What travels between relay and peers: messages, codecs, sealed mail, and who signs it."""
