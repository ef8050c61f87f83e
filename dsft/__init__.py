"""dsft: supervised fine-tuning with one Trainer and two sharding backends.

Importing this package loads neither torch nor transformers, so that --help is instant.
"""

__version__ = "0.1.0"
