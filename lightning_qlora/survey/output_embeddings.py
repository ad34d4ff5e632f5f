"""Which layers are output embeddings: their models say so, or their names."""

from collections.abc import Iterable

from torch import nn

from lightning_qlora.layers.names import last_part

OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")  # for models without get_output_embeddings


class OutputEmbeddings:
    """Which layers among some modules are output embeddings: their models say so, or their names.

    Attributes:
        of_models: Ids of those that models name.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.of_models: set[int] = set()
        for model in modules:
            if callable(getattr(model, "get_output_embeddings", None)):
                try:
                    embedding = model.get_output_embeddings()  # type: ignore[operator]
                except (NotImplementedError, AttributeError):  # transformers models without a head
                    continue
                if embedding is not None:
                    self.of_models.add(id(embedding))

    def has(self, name: str, layer: nn.Module) -> bool:
        return id(layer) in self.of_models or last_part(name) in OUTPUT_EMBEDDINGS
