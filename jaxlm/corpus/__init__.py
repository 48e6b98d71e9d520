"""Text -> token shards in the cache."""
