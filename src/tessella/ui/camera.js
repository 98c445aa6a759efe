// A picture from the camera, put into the question's box as if it came from a file. The camera is off whenever the dialog is closed.
let stream = null;
const part = (selector) => element.querySelector(selector);

function off() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
}

async function open() {
  const dialog = part("dialog");
  const told = part(".trouble");
  told.hidden = true;
  dialog.onclose = off;
  dialog.showModal();
  try {
    // Without https the browser has no camera for pages of other machines.
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (dialog.open) part("video").srcObject = stream;
    else off();
  } catch (error) {
    told.hidden = false;
    part(".trouble span").textContent = error.message;
  }
}

async function shoot() {
  const video = part("video");
  if (!video.videoWidth) return;
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  const files = new DataTransfer();
  files.items.add(new File([blob], `camera-${Date.now()}.jpg`, { type: "image/jpeg" }));
  const input = document.querySelector("#box input[type=file]");
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  part("dialog").close();
  document.querySelector("#box textarea").focus();
}

element.addEventListener("click", (click) => {
  const deed = click.target.closest("[data-do]")?.dataset.do;
  if (deed === "open") open();
  if (deed === "shoot") shoot();
  if (deed === "close") part("dialog").close();
});
