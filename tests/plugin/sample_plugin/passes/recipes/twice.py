from sample_plugin.passes.demo.every_option import EveryOption

from sparsify_compiler.pipeline import Pipeline


def twice(count: int = 1) -> Pipeline:
    """The same pass twice."""
    return Pipeline((EveryOption(count=count), EveryOption(count=count + 1)))
