"""iccache: a caching proxy in front of language models.

Start reading at `iccache.pipeline`: it is the path of one request.
"""

__version__ = "0.1.0"
