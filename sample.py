"""Makes pictures: python sample.py checkpoint=RUN_OR_FOLDER prompt="..." out=DIR; see docs/sample.md."""

from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from ldm.config.build import load_trained, read_prompts, sampling_settings, trained_size
from ldm.config.command import command
from ldm.config.versions import versions
from ldm.evaluation.grids import labelled_grid
from ldm.generation import Generator, Request, save_image


@command("sample")
def main(cfg: DictConfig) -> None:
    """Writes one PNG for each prompt and seed into `out`, and a labelled sheet of them all."""
    prompts = read_prompts(cfg.prompt, cfg.prompts)
    settings = sampling_settings(cfg, cfg.guidance_scale)
    trained = load_trained(cfg.checkpoint, cfg.weights, cfg.device)
    generator = Generator(trained.model)
    size = trained_size(trained, cfg.size)
    requests = [
        Request({"caption": prompt}, cfg.seed + i, {"caption": cfg.negative_prompt})
        for prompt in prompts
        for i in range(cfg.n)
    ]
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {name: cfg[name] for name in ("steps", "guidance_scale", "negative_prompt", "weights")}
    facts |= {"model": trained.folder.record["fingerprint"], "sampler": cfg.sampler._target_.split(".")[-1]}
    facts["versions"] = versions()
    images = []
    with tqdm(total=len(requests) * cfg.steps, unit="step", desc="sampling") as bar:
        made = generator.generate(requests, size, settings, cfg.batch_size, bar.update)
        for number, (request, image) in enumerate(zip(requests, made, strict=True)):
            name = f"{number // cfg.n:05d}_seed{request.seed}.png"
            save_image(image, out / name, facts | {"prompt": request.fields["caption"], "seed": request.seed})
            images.append(image)
    labels = [f"{request.fields['caption']} · seed {request.seed}" for request in requests[:64]]
    labelled_grid(images[:64], labels, out / "grid.png")


if __name__ == "__main__":
    main()
