"""Bad arguments of `register_transformer`: each refused by name."""

from torch import nn

from bad_arguments import assert_refused, bad, table
from vsa_diffusers import register_transformer
from vsa_diffusers.models import supported_transformers
from vsa_diffusers.processor import FamilyAttnProcessor


class Transformer(nn.Module):
    pass


class Abstract(FamilyAttnProcessor):
    pass


class Whole(FamilyAttnProcessor):
    def __call__(self, attn, hidden_states):
        return hidden_states


def read(transformer, inputs):
    return 4, 8, 8


def project(attn, hidden_states):
    return hidden_states, hidden_states, hidden_states


ROWS = [
    bad("transformer='' is not the name of a class", register_transformer, "", ""),
    bad("transformer=' ' is not the name of a class", register_transformer, " ", "layers.*"),
    bad("transformer='my.module.Video' is not", register_transformer, "my.module.Video", "layers.*"),
    bad("transformer='Video*' is not", register_transformer, "Video*", "layers.*"),
    bad("transformer=None must be a class of torch.nn.Module", register_transformer, None, "layers.*"),
    bad("transformer=3 must be a class", register_transformer, 3, "layers.*"),
    bad("transformer=Transformer must be a class", register_transformer, Transformer(), "layers.*"),
    bad("transformer=<class 'dict'> must be a class of torch.nn.Module", register_transformer, dict, "layers.*"),
    bad("transformer=[<class", register_transformer, [Transformer], "layers.*"),
    bad("modules='' can match no module", register_transformer, Transformer, ""),
    bad("modules=' ' can match no module", register_transformer, Transformer, " "),
    bad("modules='layers..attn' can match no module", register_transformer, Transformer, "layers..attn"),
    bad("modules='.layers' can match no module", register_transformer, Transformer, ".layers"),
    bad("modules='layers.' can match no module", register_transformer, Transformer, "layers."),
    bad("modules='layers.*, blocks.*' can match no module", register_transformer, Transformer, "layers.*, blocks.*"),
    bad("modules='layers[0].attn' can match no module", register_transformer, Transformer, "layers[0].attn"),
    bad("modules=None must be one pattern", register_transformer, Transformer, None),
    bad("modules=['layers.*'] must be one pattern", register_transformer, Transformer, ["layers.*"]),
    bad("modules=<function read", register_transformer, Transformer, read),
    bad("video_shape=(4, 8, 8) must be a function", register_transformer, Transformer, "layers.*", (4, 8, 8)),
    bad("video_shape='4x8x8' must be a function", register_transformer, Transformer, "layers.*", "4x8x8"),
    bad("video_shape=0 must be a function", register_transformer, Transformer, "layers.*", 0),
    bad("takes (inputs); it must be", register_transformer, Transformer, "layers.*", lambda inputs: (4, 8, 8)),
    bad("takes (a, b, c); it must be", register_transformer, Transformer, "layers.*", lambda a, b, c: (4, 8, 8)),
    bad("takes (); it must be", register_transformer, Transformer, "layers.*", lambda: (4, 8, 8)),
    bad("project='to_q' must be a function", register_transformer, Transformer, "layers.*", project="to_q"),
    bad("project=True must be a function", register_transformer, Transformer, "layers.*", project=True),
    bad("takes (attn); it must be", register_transformer, Transformer, "layers.*", project=lambda attn: attn),
    bad("processor=<class 'dict'> must be a class", register_transformer, Transformer, "layers.*", processor=dict),
    bad("processor='Whole' must be a class", register_transformer, Transformer, "layers.*", processor="Whole"),
    bad("processor=<", register_transformer, Transformer, "layers.*", processor=project),
    bad("and has a __call__", register_transformer, Transformer, "layers.*", processor=FamilyAttnProcessor),
    bad("and has a __call__", register_transformer, Transformer, "layers.*", processor=Abstract),
    bad(
        "must be a class, not an instance",
        register_transformer,
        Transformer,
        "layers.*",
        processor=object.__new__(Whole),
    ),
    bad(
        "project= and processor= were both given",
        register_transformer,
        Transformer,
        "layers.*",
        read,
        project=project,
        processor=Whole,
    ),
]


@table(ROWS)
def test_bad_registrations_are_refused_by_name(row):
    before = supported_transformers()
    assert_refused(row)
    assert supported_transformers() == before
