"""A page in the browser: draw images, keep a prologue and draw the rest again, change single
prologue tokens, draw variations of a picture of one's own.

    pip install gradio
    python tools/demo.py                 # the pair in out/, else the shipped one
    python tools/demo.py --pair l_xl     # a released pair that tools/released.py has imported
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretokenize import center_crop, to_float
from sample import (decode, default_preset, draw, load_pair, pack_for_cpu, pair_folder,
                    preset_settings)
from tokenizer import setup

# All eight pictures at once, also on a phone, and a small picture as large as a large one
STYLE = """<style>
.grid-container {max-width: 60rem; margin: auto;
    grid-template-columns: repeat(auto-fill, minmax(max(8rem, 22%), 1fr)) !important}
.image-frame img {object-fit: contain !important}
</style>"""

# The settings that have a slider, and its ends
SLIDERS = {
    "cfg_visual": (0, 20),
    "cfg_prologue": (0, 3),
    "cfg_power": (0.05, 3),
    "temperature": (0.1, 1.5),
    "temperature_prologue": (0.1, 1.5),
}


class Buttons:
    """What each button does. The page shows the seed, pictures, a table of their prologues (n, K)
    and a sentence, and keeps the prologues and what was asked for. chosen: the values of SLIDERS.
    picture and position count from 1."""

    def __init__(self, tokenizer, ar, columns):
        self.tokenizer = tokenizer
        self.ar = ar
        self.columns = columns
        names = ar.config.classes or [str(i) for i in range(ar.config.num_classes)]
        self.names = [*names, "no class"]  # its number is ar.no_class

    @torch.no_grad()
    def paint(self, text, label, seed, chosen, further=0, **kept):
        """Pictures that begin with the codes prologue (n, K) and visual (n, m), where given, drawn
        with the seed that is `further` on."""
        if seed is None or seed < 0:
            import gradio

            gradio.Warning("The seed should be a whole number, 0 or more.")
            return [gradio.skip()] * 6
        seed += further
        n = self.columns
        labels = torch.full((n,), self.names.index(label))
        settings = dict(zip(SLIDERS, chosen))
        codes = draw(self.ar, labels, range(n), seed, n, settings, **kept)
        images = decode(self.tokenizer, codes, n).numpy()  # (n, H, W, 3)
        pictures = [(image, str(i + 1)) for i, image in enumerate(images)]
        prologue = codes[:, : self.ar.config.num_prologue].cpu()
        table = [[i + 1, *row] for i, row in enumerate(prologue.tolist())]
        return seed, pictures, table, text, prologue, (label, seed, chosen)

    def resample(self, label, seed, asked, *chosen):
        """With the next seed if these pictures have been asked for already."""
        further = 1 if (label, seed, chosen) == asked else 0
        return self.paint("Each picture is drawn from its own noise.", label, seed, chosen, further)

    def keep_prologue(self, label, seed, picture, prologue, *chosen):
        kept = prologue[picture - 1].expand(self.columns, -1)
        text = f"All pictures share prologue {picture}; their visual tokens are drawn again."
        return self.paint(text, label, seed, chosen, 1, prologue=kept)

    def change_token(self, label, seed, picture, position, code, prologue, *chosen):
        changed = prologue.clone()
        changed[picture - 1, position - 1] = code
        text = (f"Token {position} of prologue {picture} is now {code}; the noise of the visual "
                "tokens is the same as before.")
        return self.paint(text, label, seed, chosen, prologue=changed)

    def vary(self, label, seed, uploaded, share, *chosen):
        """Pictures under the prologue of `uploaded` (PIL, RGB), with its rows of patches from the
        top as far as `share` says; and before them its reconstruction."""
        config = self.tokenizer.config
        k = config.num_prologue
        rows = min(round(share * config.grid), config.grid - 1)  # as variations.py's --keep
        crop = torch.tensor(center_crop(uploaded, config.image_size))  # (H, W, 3)
        x = to_float(crop[None]).to(self.ar.head.weight.device)
        codes = self.tokenizer.encode(x)  # (1, K+N)
        whole = codes.expand(self.columns, -1)
        kept = dict(prologue=whole[:, :k], visual=whole[:, k : k + rows * config.grid])
        text = f"Your picture, of {config.grid} rows the lower {config.grid - rows} drawn again."
        reconstruction = decode(self.tokenizer, codes, 1)[0].numpy()
        return reconstruction, *self.paint(text, label, seed, chosen, 1, **kept)


def build_page(buttons, settings):
    """The gradio page; settings are where the sliders start."""
    import gradio

    config = buttons.tokenizer.config
    k = config.num_prologue
    with gradio.Blocks(title="Prologue") as page:
        gradio.Markdown("# Prologue\nAn image is *[prologue tokens] + [visual tokens]*.")
        prologue = gradio.State()
        asked = gradio.State()
        with gradio.Row():
            label = gradio.Dropdown(buttons.names, value=buttons.names[0], label="class")
            seed = gradio.Number(0, label="seed", precision=0)
        with gradio.Row():
            sliders = [gradio.Slider(low, high, settings[name], label=name)
                       for name, (low, high) in SLIDERS.items()]
        draw_all = gradio.Button("draw", variant="primary")
        gallery = gradio.Gallery(height="max-content", object_fit="contain", show_label=False,
                                 allow_preview=False)
        text = gradio.Markdown()
        table = gradio.Dataframe(headers=["picture", *map(str, range(1, k + 1))], visible=k > 0,
                                 label="prologue codes", interactive=False)
        shown = [seed, gallery, table, text, prologue, asked]
        for event in (draw_all.click, seed.submit, page.load):
            event(buttons.resample, [label, seed, asked, *sliders], shown)
        if k > 0:
            with gradio.Row():
                picture = gradio.Slider(1, buttons.columns, 1, step=1, label="picture")
                position = gradio.Slider(1, k, 1, step=1, label="prologue token")
                code = gradio.Slider(0, config.prologue_codebook_size - 1, step=1, label="new code")
            with gradio.Row():
                keep = gradio.Button("keep the prologue of that picture, draw the rest again")
                change = gradio.Button("change that token")

            def select(event: gradio.SelectData):
                return event.index + 1

            gallery.select(select, None, picture)
            keep.click(buttons.keep_prologue, [label, seed, picture, prologue, *sliders], shown)
            change.click(buttons.change_token,
                         [label, seed, picture, position, code, prologue, *sliders], shown)
        if config.layout != "1d":  # it has neither a prologue nor rows of patches to keep
            lowest = 0 if k > 0 else 1 / config.grid
            with gradio.Row():
                uploaded = gradio.Image(type="pil", sources=["upload", "clipboard"], height=200,
                                        label="a picture of your own")
                decoded = gradio.Image(interactive=False, height=200, label="its reconstruction")
                with gradio.Column():
                    share = gradio.Slider(lowest, 1, lowest, label="share of rows to keep")
                    vary = gradio.Button("draw the rest of your picture again", interactive=False)
            uploaded.change(lambda image: gradio.Button(interactive=image is not None), uploaded,
                            vary)
            vary.click(buttons.vary, [label, seed, uploaded, share, *sliders], [decoded, *shown])
        gradio.HTML(STYLE)
    return page


def main():
    parser = argparse.ArgumentParser(description="A page to draw images on.")
    parser.add_argument("--pair", help="folder of tokenizer and AR model; else out, or if that has "
                        "none the shipped pair")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = setup(args.device)[2]
    tokenizer, ar = load_pair(pair_folder(args.pair), device)
    if device.type == "cpu":
        pack_for_cpu(ar)
    settings = preset_settings(default_preset(ar), no_cfg=False)
    build_page(Buttons(tokenizer, ar, 8), settings).launch()


if __name__ == "__main__":
    main()
