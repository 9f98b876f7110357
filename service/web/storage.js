// What the browser keeps by name. Where it keeps nothing (a private window, no room), the page has it until it is closed.
class Storage {
  constructor(place) {  // a function, because a browser may refuse even to name the place
    Object.assign(this, { place, unsaved: new Map() });
  }

  get(name) {
    if (this.unsaved.has(name)) return this.unsaved.get(name);
    try { return this.place().getItem(name); } catch { return null; }
  }

  set(name, value) {
    try {
      this.place().setItem(name, value);
      this.unsaved.delete(name);
    } catch {
      this.unsaved.set(name, value);
    }
  }
}

export const ofBrowser = new Storage(() => localStorage), ofTab = new Storage(() => sessionStorage);
