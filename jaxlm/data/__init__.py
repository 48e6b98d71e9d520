"""Token shards -> batch n."""
