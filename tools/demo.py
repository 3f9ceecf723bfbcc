"""A page on this machine's browser: draw images, keep a prologue and draw the rest anew, change single prologue tokens.

    pip install gradio
    python tools/demo.py                                # out/ if it holds a pair, else the checkpoint in the repository
    python tools/demo.py --tokenizer ckpts/prologue-l-tokenizer --ar ckpts/ar-prologue-l-xl --preset prologue-l-xl
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import InputError, Machine, common_flags, run
from sample import PRESETS, Sampler, load_pair, sampling_defaults


def page(sampler, columns):
    """The gradio page. Its state is the prologue (columns, K) behind each picture and the seed of the visual tokens."""
    import gradio
    cfg, settings = sampler.ar.cfg, sampler.settings
    names = cfg.classes or [str(i) for i in range(cfg.num_classes)]
    k = cfg.num_prologue

    def draw(label, seed, chosen, prologue=None):
        sampler.seed, sampler.settings = int(seed), dict(zip(settings, chosen))
        labels = torch.full((columns,), names.index(label))
        codes = sampler.codes(labels, range(columns), prologue)
        table = [[i + 1, *row] for i, row in enumerate(codes[:, :k].tolist())]
        return list(sampler.pixels(codes).numpy()), codes[:, :k], table

    def resample_all(label, seed, *chosen):
        return *draw(label, seed, chosen), "Each picture has a prologue of its own."

    def keep_prologue(label, seed, picture, prologue, *chosen):
        if prologue is None:
            prologue = draw(label, seed, chosen)[1]
        seed += 1
        kept = prologue[[int(picture) - 1]].expand(columns, -1)
        return *draw(label, seed, chosen, kept), seed, f"All pictures share prologue {int(picture)}; visual tokens drawn anew."

    def change_token(label, seed, picture, position, code, prologue, *chosen):
        if prologue is None:
            prologue = draw(label, seed, chosen)[1]
        changed = prologue.clone()
        changed[int(picture) - 1, int(position) - 1] = int(code)
        return *draw(label, seed, chosen, changed), (f"Token {int(position)} of prologue {int(picture)} is now {int(code)}; "
                                                     "the noise behind the visual tokens is the same as before.")

    with gradio.Blocks(title="Prologue") as blocks:
        gradio.Markdown("# Prologue\nAn image is *[prologue tokens] + [visual tokens]*. Draw, keep a prologue, change one token.")
        prologue = gradio.State(None)
        with gradio.Row():
            label = gradio.Dropdown(names, value=names[0], label="class")
            seed = gradio.Number(0, label="seed", precision=0)
        with gradio.Row():
            sliders = [gradio.Slider(low, high, settings[key], label=key) if high else gradio.State(settings[key])
                       for key in settings for low, high in [{
                           "cfg_visual": (0, 10), "cfg_prologue": (0, 3), "cfg_power": (0.05, 3), "temperature": (0.1, 1.5),
                           "temperature_prologue": (0.1, 1.5)}.get(key, (0, 0))]]
        every = gradio.Button("resample all", variant="primary")
        pictures = gradio.Gallery(columns=columns, height=160, label="pictures", object_fit="contain")
        said = gradio.Markdown()
        if k:
            codes = gradio.Dataframe(headers=["picture", *(f"p{i + 1}" for i in range(k))], label="prologue codes",
                                     interactive=False)
            with gradio.Row():
                picture = gradio.Slider(1, columns, 1, step=1, label="picture")
                position = gradio.Slider(1, k, 1, step=1, label="prologue token")
                code = gradio.Slider(0, cfg.prologue_codebook_size - 1, 0, step=1, label="new code")
            with gradio.Row():
                keep = gradio.Button("keep the prologue of that picture, resample the rest")
                change = gradio.Button("change that token")
            keep.click(keep_prologue, [label, seed, picture, prologue, *sliders], [pictures, prologue, codes, seed, said])
            change.click(change_token, [label, seed, picture, position, code, prologue, *sliders],
                         [pictures, prologue, codes, said])
        else:
            codes = gradio.State(None)
        for event in (every.click, blocks.load):
            event(resample_all, [label, seed, *sliders], [pictures, prologue, codes, said])
    return blocks


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokenizer", help="tokenizer file or released directory")
    parser.add_argument("--ar", help="AR file or released directory")
    parser.add_argument("--preset", choices=PRESETS, help="sampling settings to start with")
    parser.add_argument("--columns", type=int, default=8, help="pictures drawn at a time")
    parser.add_argument("--port", type=int, default=7860)
    common_flags(parser, batch_size=64)
    args = parser.parse_args()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("the page needs gradio: pip install gradio") from None
    machine = Machine(args)
    tokenizer, ar, _ = load_pair(args, machine.device)
    ar.freeze(machine.dtype)
    sampler = Sampler(ar, tokenizer, machine, args.seed, args.batch_size, sampling_defaults(args.preset, False))
    page(sampler, args.columns).launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    run(main)
