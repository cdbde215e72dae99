"""Make docs/images/diagnose.png: train as configs/products.yaml does, diagnose, and photograph the first screen.

Usage: python docs/diagnose_page.py (needs Chromium, and Playwright from the extra `test`)
"""

import shutil
import tempfile
from pathlib import Path

from anomalib.engine import Engine
from omegaconf import OmegaConf
from playwright.sync_api import sync_playwright

from anomalib_wtflow import Products, WTFlow, diagnose

FOLDER = Path(__file__).parent


def main() -> None:
    """Train, diagnose, photograph."""
    config = OmegaConf.to_container(OmegaConf.load(FOLDER.parent / "configs" / "products.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        members = config["data"]["init_args"]["members"]
        for member in members.values():
            member["init_args"]["root"] = folder
        data, engine = Products(members=members), Engine(default_root_dir=folder, logger=False)
        engine.fit(WTFlow(**config["model"]["init_args"]), datamodule=data)
        page = diagnose(engine.best_model_path, data, Path(folder) / "page")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": 1400, "height": 940})
            view.goto(page.as_uri())
            view.screenshot(path=FOLDER / "images" / "diagnose.png")
            browser.close()


if __name__ == "__main__":
    main()
