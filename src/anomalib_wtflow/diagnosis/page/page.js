"use strict";
{
  const gallery = document.getElementById("gallery");
  if (gallery) {
    const entries = [...gallery.querySelectorAll(".entry")];
    const buttons = [...gallery.querySelectorAll("[data-choice]")];
    const kind = document.getElementById("kind");
    const product = document.getElementById("product");
    const dialog = gallery.querySelector("dialog");
    let verdict = "";

    const update = () => {
      const wanted = { verdict, kind: kind.value, product: product.value };
      let count = 0;
      for (const entry of entries) {
        const shown = Object.entries(wanted).every(([key, value]) => !value || entry.dataset[key] === value);
        entry.hidden = !shown;
        count += shown;
      }
      for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.choice === verdict);
      document.getElementById("shown").textContent = `${count} of ${entries.length} images`;
    };

    const enlarge = (entry) => {
      const place = dialog.querySelector(".pair");
      place.replaceChildren(...[...entry.querySelectorAll("img")].map((image) => image.cloneNode()));
      dialog.querySelector("p").replaceChildren(...entry.querySelector("figcaption").cloneNode(true).childNodes);
      dialog.showModal();
    };

    for (const button of buttons) {
      button.addEventListener("click", () => { verdict = button.dataset.choice; update(); });
    }
    for (const select of [kind, product]) select.addEventListener("change", update);
    for (const entry of entries) entry.querySelector("button").addEventListener("click", () => enlarge(entry));
    document.getElementById("size").addEventListener("input", (event) => {
      document.documentElement.style.setProperty("--side", `${event.target.value}px`);
    });
    update();
  }
}
