"""Text -> token shards -> batch n."""
