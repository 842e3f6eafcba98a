import SwiftUI

@main
struct EdgekdDemoApp: App {
    var body: some Scene {
        WindowGroup {
            ContentView()
        }
    }
}
