// Buttons of the quick bar: kinds, pictures, questions. On a narrow screen the pictures are folded away at first.
if (window.innerWidth < 640) element.querySelector("details")?.removeAttribute("open");
element.addEventListener("click", (click) => {
  const button = click.target.closest("button");
  if (!button) return;
  const [[name, number]] = Object.entries(button.dataset);
  trigger("select", { what: name, number: +number });
});
