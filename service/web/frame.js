// What all pages have: navigation, the API key of the tab, light and dark.
import { $ } from "./element.js";
import { ofBrowser, ofTab } from "./storage.js";

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}

const page = ({ pathname }) => pathname.replace(/\/$/, "");  // served with and without a slash at its end
for (const link of document.querySelectorAll("nav a")) {
  if (page(link) === page(location)) link.setAttribute("aria-current", "page");
}
$("theme").addEventListener("click", () => {
  const chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  ofBrowser.set("theme", chosen);
  theme(chosen);
});
theme(ofBrowser.get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
$("key").value = ofTab.get("key") || "";
$("key").addEventListener("change", () => {
  ofTab.set("key", $("key").value);
  $("access").open = false;
});
