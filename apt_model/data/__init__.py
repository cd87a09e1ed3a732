"""Text as tokens: where it comes from, and which piece of it makes which batch. No torch needed to count."""

from apt_model.data.corpora import Corpus, JsonlCorpus, StdlibCorpus, TextCorpus
from apt_model.data.sampler import Sampler

__all__ = ["Corpus", "JsonlCorpus", "Sampler", "StdlibCorpus", "TextCorpus"]
