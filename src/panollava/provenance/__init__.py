"""Whether a result still belongs to its inputs: code digests, fingerprints, unfinished work."""
