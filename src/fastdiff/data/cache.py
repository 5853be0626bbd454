"""Precomputed tensors (latents, text embeddings, noise-sample pairs) in safetensors shards with random access.

A cache folder holds shard-00000.safetensors ..., at most one null.safetensors (the conditioning of the empty prompt,
stored once) and index.json. In a shard, field f of its n records is one tensor of shape (n, *shape of f); captions are
UTF-8 bytes end to end, with the end of each. Shards and index are written aside and renamed, the index last, so a
killed writer leaves whole shards and a new writer goes on behind them.
"""

from fastdiff.data.cache_index import CacheError, CacheMeta, CacheMismatchError, Field
from fastdiff.data.cache_reader import CacheReader, CacheRecord
from fastdiff.data.cache_writer import CacheWriter

__all__ = ["CacheError", "CacheMeta", "CacheMismatchError", "CacheReader", "CacheRecord", "CacheWriter", "Field"]
