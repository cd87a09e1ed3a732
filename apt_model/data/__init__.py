"""Text as tokens: where it comes from, and which piece of it makes which batch. No torch needed to count."""

from apt_model.data.corpora import JsonlCorpus, ShardsCorpus, StdlibCorpus, TextCorpus
from apt_model.data.corpus import Corpus
from apt_model.data.huggingface import HFCorpus
from apt_model.data.sampler import Sampler

__all__ = ["Corpus", "HFCorpus", "JsonlCorpus", "Sampler", "ShardsCorpus", "StdlibCorpus", "TextCorpus"]
