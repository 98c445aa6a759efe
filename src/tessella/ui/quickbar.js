// Buttons of the quick bar: kinds, pictures, questions. The pictures stay folded or open as a person left them; at first they
// are folded where there is little room.
let open = window.innerWidth >= 640 && window.innerHeight >= 640;

function fold() {
  const details = element.querySelector("details");
  if (details) details.open = open;
}

element.addEventListener("toggle", (toggled) => { open = toggled.target.open; }, true); // toggle does not bubble
element.addEventListener("click", (click) => {
  const button = click.target.closest("button");
  if (!button) return;
  const [[name, number]] = Object.entries(button.dataset);
  trigger("select", { what: name, number: +number });
});
watch("value", fold);
fold();
